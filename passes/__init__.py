"""Graph -> graph: the compiler behind `fastvar_fx`. It imports torch and nothing of its users.

A captured call passes, in this order, through

    capture     a call of a live module becomes a functional FX graph
    branches    its residual branches are found and asked, op by op, if tokens may be dropped
    features    (cache step) the graph also returns what its branches add
    prune       (pruned steps) its branches become PTS -> branch -> CTR
    kv_buffer   the caches it grows by `cat` become buffers that it appends to
    validate    the graph, unpruned and with permuted tokens, is run against the real call

`pipeline` holds that order; `costs` counts the FLOPs for the report.
"""

from typing import Final

OWNER: Final = "fastvar_fx"
"""The distribution this folder belongs to; `fastvar_fx` checks it, for the name is a common one."""
