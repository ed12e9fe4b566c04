"""Annotators that are networks with weights of their own; ``rows`` puts them into the table of kinds of hints."""
