"""Calibration: what static codecs know beforehand of the partials of every site and rank.

``Statistics`` gathers it while a model runs over a text, ``Calibration`` is the file that holds the tables.
"""

from megacomp.calibration.file import Calibration, CalibrationError, SiteTables
from megacomp.calibration.statistics import SUM, Statistics, tables_of

__all__ = ["SUM", "Calibration", "CalibrationError", "SiteTables", "Statistics", "tables_of"]
