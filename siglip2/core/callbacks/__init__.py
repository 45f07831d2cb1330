"""What watches a run without changing it: counters, evaluations, the report."""
