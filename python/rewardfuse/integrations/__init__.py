"""Drop-ins for trainers that people already have; each module is imported by name, so that none of them is required."""
