"""Ways to fit a head to rows. A new solver goes beside `ridge` and is named in `heads.train`."""
