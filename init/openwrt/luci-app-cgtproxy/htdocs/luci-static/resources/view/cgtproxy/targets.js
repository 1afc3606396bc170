'use strict';
'require view';
'require form';
'require uci';
'require cgtproxy.tools as tools';

function section(map, type, title, description, rows) {
	const s = map.section(form.GridSection, type, title, description);
	s.addremove = true;
	s.nodescriptions = true;
	const enabled = s.option(form.Flag, 'enabled', _('Enabled'));
	enabled.default = '1';
	enabled.editable = true;
	const name = s.option(form.Value, 'name', _('Name'), _('Where it has a character that a section\'s name cannot have'));
	name.modalonly = true;
	name.optional = true;
	name.validate = (id, value) => !value || /^[A-Za-z][A-Za-z0-9_-]{0,14}$/.test(value)
		? true : _('A letter, then up to 14 letters, digits, _ or -');
	tools.options(s, null, rows.concat(tools.outlet()));
	/* in the table as well */
	for (const option of s.children)
		if (option.option == rows[0][0])
			option.modalonly = undefined;
	return s;
}

return view.extend({
	load: () => Promise.all([ tools.status(), uci.load('cgtproxy') ]),

	render: function([ status ]) {
		const map = tools.map(_('Proxies and routes'), _('Where rules and gateways send traffic.'));
		const tproxy = section(map, 'tproxy', _('Proxies'), _('TPROXY servers on this router, like mihomo, xray or sing-box.'), [
			[ 'port', 'value', _('Port'), _('Its TPROXY port'), '7893' ],
			[ 'address', 'list', _('Addresses'), _('Look for the listener at this address, one of each family'), '127.0.0.1' ]
		]);
		const port = tproxy.children.find(option => option.option == 'port');
		port.datatype = 'port';
		port.rmempty = port.optional = false;
		section(map, 'route', _('Routes'), _('Ways out by an interface and nothing else, like a VPN.'), [
			[ 'interface', 'value', _('Interface'), null, 'wg0' ],
			[ 'gateway', 'list', _('Next hops'), _('On that interface, one of each family'), '10.8.0.1' ],
			[ 'table', 'value', _('Table'), _('Instead of an interface: a routing table that somebody else keeps'), '1000' ],
			[ 'masquerade', 'choice', _('Masquerade'), _('Unless it is set: yes with an interface, no with a table'),
				[ [ 'yes', _('yes') ], [ 'no', _('no') ] ] ]
		]);
		tools.tell_refused(status);
		return map.render();
	},

	handleSaveApply: function(ev, mode) {
		return tools.save_and_apply(this, ev, mode);
	}
});
