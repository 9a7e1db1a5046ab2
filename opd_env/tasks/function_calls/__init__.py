"""Tasks whose answers are function calls: the Berkeley leaderboard's, and the OPD+ paper's."""
