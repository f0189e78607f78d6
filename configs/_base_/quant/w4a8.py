quant = dict(preset='w4a8', scope='backbone')
