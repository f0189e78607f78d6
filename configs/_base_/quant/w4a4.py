quant = dict(preset='w4a4', scope='backbone')
