"""The soak test: random users and faults against an oracle."""
