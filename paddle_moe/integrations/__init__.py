"""Models of other packages on paddle_moe: paddle_moe.integrations.paddlenlp and .paddleformers.

blocks.py is the core, which knows no model; each other module is a table of the blocks of one package.
"""
