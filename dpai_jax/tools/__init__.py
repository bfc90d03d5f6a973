"""General tools on arrays and pytrees. They know neither paths nor pruning."""
