"""The worker role: owns a machine's resources, leases them out, runs jobs in executor processes."""
