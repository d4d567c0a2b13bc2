"""The memory layer of UltraMemV2 and its family: retrieval, tables, sharing, initialisation, losses, statistics."""
