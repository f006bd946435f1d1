"""Pages for people: charts, tables, sentences and pictures as HTML that needs no other file."""
