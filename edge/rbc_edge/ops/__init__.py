"""For the people who run a station: examine, measure, try, ask for help."""
