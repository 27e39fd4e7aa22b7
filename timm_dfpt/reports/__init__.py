"""Reports of a run or a comparison: predictions of its models, what follows from them, and a page about it."""
