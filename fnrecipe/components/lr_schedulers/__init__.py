"""Learning-rate schedules, by the names that `lr_scheduler.name` takes."""
