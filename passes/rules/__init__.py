"""The axis rules. Importing this package fills the one table of them."""

from passes.rules import opaque, pointwise, product, reduce, views
from passes.rules.attention import attention_flops, is_attention, key_count, key_operand
from passes.rules.site import (
    Edit,
    Gather,
    Recount,
    Replace,
    Resize,
    Rule,
    Site,
    Slot,
    apply_rule,
    rule,
)

__all__ = [
    "Edit",
    "Gather",
    "Recount",
    "Replace",
    "Resize",
    "Rule",
    "Site",
    "Slot",
    "apply_rule",
    "attention_flops",
    "is_attention",
    "key_count",
    "key_operand",
    "opaque",
    "pointwise",
    "product",
    "reduce",
    "rule",
    "views",
]
