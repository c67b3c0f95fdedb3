"""Reports as one HTML file each, which needs no network. They need the extra `cli`.

`data` holds what a page shows, `explained` makes it of a report, `demonstration` of a measurement,
and `html` puts it into the templates beside it.
"""
