"""Fast paths held against slow, obviously correct ones."""
