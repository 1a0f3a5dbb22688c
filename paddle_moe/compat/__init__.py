"""Entry points with the names and signatures of other Paddle packages, on this package's operator."""
