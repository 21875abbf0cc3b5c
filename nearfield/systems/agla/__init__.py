"""AGLA: what the whole picture and the part that matters for the prompt expect next, added up."""
