"""What a run tells: metrics, events, tracking, environment, report."""
