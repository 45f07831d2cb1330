"""What a data set is made of: read once, summed up as a table, as JSON and as a page. No model and no trainer."""
