quant = dict(preset='w8a8', scope='backbone', target='tensorrt')
