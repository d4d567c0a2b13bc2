"""Ranks and what they exchange: launch, process groups, the CPU platform."""
