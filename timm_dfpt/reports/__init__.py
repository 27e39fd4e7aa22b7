"""What a run or a comparison shows of itself: what its models said, what follows from that, and a page about it."""
