"""Analysis: what a graph consists of, and what may change in it. Nothing here edits a graph."""
