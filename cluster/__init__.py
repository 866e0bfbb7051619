"""The same work spread over machines: Ray actors, placement, artifact storage."""
