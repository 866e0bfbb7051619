"""From rows of a data platform to the set of facts that a model should know."""
