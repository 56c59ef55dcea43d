"""What the stages found, for people (tables, show) and for programs (model)."""
