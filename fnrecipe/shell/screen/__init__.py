"""What the user of a run is shown while it trains."""
