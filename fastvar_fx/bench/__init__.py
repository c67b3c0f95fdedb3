"""The benchmark: what `fastvar-fx bench` measures and draws."""
