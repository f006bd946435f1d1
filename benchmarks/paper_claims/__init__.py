"""The papers' claims: as data, the runs that they need, their measurement and the judgement."""
