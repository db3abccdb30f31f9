"""A trained model, used without training: loaded, evaluated, spoken with, exported."""
