"""What a person reads of a plan, a family, an artifact or a pilot: tables in a terminal."""
