"""Behaviour shift: where a response comes from, what heads and layers know, before and after tuning."""
