"""Records of a suite as tables, figures, one offline HTML file, and exports.

`reports.frames.SuiteView` is what the package is given; it reads no store and imports neither torch
nor Ray.
"""
