"""What a run costs: FLOPs from the models' shapes, joules from counters, and a ledger that adds both up by phase."""
