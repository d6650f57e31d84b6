"""`--stop-when`: a run that is measured while it trains, stops in time, and keeps its best adapter."""
