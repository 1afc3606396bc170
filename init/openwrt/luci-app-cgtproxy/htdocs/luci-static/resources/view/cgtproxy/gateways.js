'use strict';
'require view';
'require form';
'require uci';
'require cgtproxy.tools as tools';

return view.extend({
	load: () => Promise.all([ tools.hints(), tools.networks(), tools.status(), uci.load('cgtproxy') ]),

	render: function([ hints, networks, status ]) {
		const map = tools.map(_('Gateways'),
			_('Traffic that this router routes for others. The first section that covers it decides. Drag to reorder.'));
		const s = map.section(form.GridSection, 'gateway');
		s.anonymous = s.addremove = s.sortable = s.nodescriptions = true;
		let o = s.option(form.Flag, 'enabled', _('Enabled'));
		o.default = '1';
		o.editable = true;
		o = s.option(form.Value, 'name', _('Name'));
		o.optional = true;
		o.textvalue = (id) => uci.get('cgtproxy', id, 'name') || (/^cfg/.test(id) ? '-' : id);
		o.validate = (id, value) => /^[A-Za-z0-9_-]*$/.test(value) ? true : _('Letters, digits, _ and -');
		o = s.option(form.ListValue, 'target', _('Target'));
		tools.targets().forEach(name => o.value(name));
		o.rmempty = false;
		o = s.option(form.DynamicList, 'network', _('Networks'), _('Where the traffic comes in'));
		o.optional = true;
		o.validate = tools.one_line;
		for (const network of networks)
			if (network != 'loopback')
				o.value(network);
		tools.options(s, null, [
			[ 'interface', 'list', _('Devices'), _('Instead of a network; a * at the end covers what begins so'), 'br-lan' ],
			[ 'source', 'list', _('Sources'), _('These addresses alone'), '192.168.1.0/24' ]
		]);
		o = s.option(form.DynamicList, 'source_mac', _('Hosts'), _('These Ethernet addresses alone'));
		o.optional = true;
		o.datatype = 'macaddr';
		const hosts = {};
		for (const mac in hints) {
			const names = [ hints[mac].name, (hints[mac].ipaddrs || [])[0] ].filter(name => name);
			hosts[mac.toLowerCase()] = names[0];
			o.value(mac.toLowerCase(), '%s (%s)'.format(names.join(', ') || '?', mac.toLowerCase()));
		}
		o.textvalue = (id) => L.toArray(uci.get('cgtproxy', id, 'source_mac'))
			.map(mac => hosts[mac.toLowerCase()] || mac).join(', ') || '-';
		tools.tell_refused(status);
		return map.render();
	},

	handleSaveApply: function(ev, mode) {
		return tools.save_and_apply(this, ev, mode);
	}
});
