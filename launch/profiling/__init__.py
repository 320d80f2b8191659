"""What `headrace.launch.throughput` is made of: systems to compare, tables, pictures, advice."""
