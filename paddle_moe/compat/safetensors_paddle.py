"""safetensors.paddle.save_file, which Paddle before 3.0 cannot import: it names dtypes that came with 3.0."""

import paddle

_absent = [name for name in ("float8_e4m3fn", "float8_e5m2") if not hasattr(paddle, name)]
for _name in _absent:
    setattr(paddle, _name, object())
try:
    from safetensors.paddle import save_file
finally:
    for _name in _absent:
        delattr(paddle, _name)

__all__ = ["save_file"]
