from controlkit.measure.evaluate import *  # noqa
from controlkit.measure.evaluate import fid, metric_of
