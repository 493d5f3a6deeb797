"""Every contender: fastguide, the field, and what a careful user writes in plain torch."""
