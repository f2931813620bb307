"""One file per verb. A job knows files, layouts, adapters and algebra; it knows no front end."""
