"""The axis rules; importing any of them fills the one table, in `site`."""

from passes.analyse.rules import attention, opaque, pointwise, product, reduce, views  # noqa: F401
