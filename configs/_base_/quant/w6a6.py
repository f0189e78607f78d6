quant = dict(preset='w6a6', scope='backbone')
