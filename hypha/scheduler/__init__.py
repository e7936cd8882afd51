"""The scheduler role: finds workers, leases them, and leads one job from its first round to its last."""
