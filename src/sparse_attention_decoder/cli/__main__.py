"""python -m sparse_attention_decoder.cli"""

from sparse_attention_decoder.cli import main

main()
