"""Stands for Transformer Engine where there is no GPU: its linear layers on the CPU, and what Megatron-core asks for.

Written after reading `transformer_engine/pytorch/module/linear.py`, `layernorm_linear.py` and `distributed.py` of
1.13.0, 2.4.0, 2.8.0, 2.11.0 and 2.20.2. What they have in common, and what this therefore does:

* `Linear.forward` calls an autograd function, or its forward alone without gradients, with `self.tp_group`,
  `self.tp_size`, `self.sequence_parallel` and `self.parallel_mode` as they are at that moment.
* That function looks the collectives up in the globals of its own module, where they were imported by name. After the
  product, a row-parallel layer over more than one rank calls `reduce_scatter_along_first_dim(out, tp_group)` if
  sequence parallel, else `allreduce(out, tp_group)`, and takes the first of the two things they answer with. Before
  it, a sequence-parallel column-parallel one calls `gather_along_first_dim(input, tp_group)`, from 2.1 with
  `quantizer=`, and later frees the storage of what it got.
* The bias of a row-parallel layer is added after that, once, or returned beside the output (`return_bias`).
* Backward passes use the same globals, with `async_op=True`.

The answers of the collectives are held to what the real layers do with them: see `module/linear.py`. The same tests run
over the real package, its compiled part stood in for, in `make compat`.
"""

from importlib import metadata

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = str(metadata.version("transformer_engine"))
