"""Numbers to widths: budgets, the cost polynomial, the sensitivity table and the allocations over it (no torch)."""
