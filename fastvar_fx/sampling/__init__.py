"""Many images into a folder, from one process or many: `fastvar-fx sample`.

The images are divided into batches by their index, and the batches among the processes. What an
image shows depends on its index alone, so a run can be cut off, resumed and spread over machines.
"""

from fastvar_fx.sampling.drawing import one_by_one

__all__ = ["one_by_one"]
