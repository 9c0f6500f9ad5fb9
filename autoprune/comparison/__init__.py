"""The verb `compare`: strategies and samplers at equal ledgers, and a verdict by a rule fixed beforehand."""
